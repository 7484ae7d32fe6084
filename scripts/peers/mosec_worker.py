"""A mosec server whose workers take as long as $WORK_SECONDS and answer with what they got.

There are $WORKERS of them [2], and each takes up to $BATCH items at a time [1].
"""

import os
import time

from mosec import Server, Worker

WORK = float(os.environ.get("WORK_SECONDS", 0))
WORKERS = int(os.environ.get("WORKERS", 2))
BATCH = int(os.environ.get("BATCH", 1))


class Echo(Worker):
    def deserialize(self, data):
        return data

    def serialize(self, data):
        return data

    def forward(self, data):
        if WORK:
            time.sleep(WORK)
        return data


if __name__ == "__main__":
    server = Server()
    server.append_worker(Echo, num=WORKERS, max_batch_size=BATCH)
    server.run()
