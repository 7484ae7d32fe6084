"""Triton's side of the echo."""

import os
import sys

# It runs an interpreter of its own, which reads no PYTHONPATH.
sys.path.insert(0, os.environ["PACKAGES"])

import triton_python_backend_utils as triton  # noqa: E402


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(triton.get_input_tensor_by_name(request, "INPUT").as_numpy()) for request in requests]

    def answer(self, array):
        return triton.InferenceResponse([triton.Tensor("OUTPUT", array)])
