"""A handler whose module takes as long to import in a worker, or in what forks workers, as a pipe's writer likes."""

import os

LOADED = ""
if {"FORKRING_WORKER", "FORKRING_NURSERY"} & os.environ.keys():
    with open(os.environ["LOAD"]) as pipe:
        LOADED = pipe.read()


def handle(item):
    return LOADED
