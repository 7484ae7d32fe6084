"""A mosec server whose workers take as long as $WORK_SECONDS and answer with what they got."""

import os
import time

from mosec import Server, Worker

WORK = float(os.environ["WORK_SECONDS"])


class Echo(Worker):
    def deserialize(self, data):
        return data

    def serialize(self, data):
        return data

    def forward(self, data):
        time.sleep(WORK)
        return data


if __name__ == "__main__":
    server = Server()
    server.append_worker(Echo, num=2)
    server.run()
