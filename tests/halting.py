"""A child that stands still in the middle of its first message."""

import os
import struct
import time


def main(connection):
    connection.recv()
    os.write(connection.fileno(), struct.pack("!i", 1000) + b"the beginning")
    time.sleep(60)
