"""A handler that writes down what it does, before it does it."""

import hashlib
import os
import time

journal = os.open(os.environ["JOURNAL"], os.O_WRONLY | os.O_APPEND)


def work(item):
    """Quick, but now and then one takes long enough for its worker to be killed in the midst of it."""
    os.write(journal, b"%d %d\n" % (item.id, item.attempt))
    if item.id % 50 == 0:
        time.sleep(0.001)
    return hashlib.sha256(item.payload).digest()
