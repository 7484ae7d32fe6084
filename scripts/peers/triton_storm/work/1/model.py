"""Triton's side of the storm: an item takes as long as the others'."""

import os
import sys
import time

# It runs an interpreter of its own, which reads no PYTHONPATH.
sys.path.insert(0, os.environ["PACKAGES"])

import triton_python_backend_utils as triton  # noqa: E402


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        time.sleep(float(os.environ["WORK_SECONDS"]))
        array = triton.get_input_tensor_by_name(request, "INPUT").as_numpy()
        return triton.InferenceResponse([triton.Tensor("OUTPUT", array)])
