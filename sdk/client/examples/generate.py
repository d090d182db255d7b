"""Draws a picture with the daemon, by way of an ordinary D-Bus library.

    pip install dbus-fast
    python generate.py "a cat on the beach" cat.png [BUS_ADDRESS]

BUS_ADDRESS is that of a message bus or of the daemon's own socket (unix:path=/run/user/1000/blocklora/bus); without it
the session bus is used.
"""

import asyncio
import os
import sys

from dbus_fast import BusType, Message, MessageType, Variant
from dbus_fast.aio import MessageBus

NAME = "org.blocklora.Daemon1"
PATH = "/org/blocklora/Daemon1"


async def call(bus, path, interface, member, signature="", body=()):
    """Calls a method; the reply's body and file descriptors. A D-Bus error becomes an exception with its name."""
    message = Message(NAME, path, f"{NAME}.{interface}", member, signature=signature, body=list(body))
    reply = await bus.call(message)
    if reply.message_type == MessageType.ERROR:
        raise RuntimeError(f"{reply.error_name}: {reply.body[0] if reply.body else ''}")
    return reply.body, reply.unix_fds


async def generate(prompt, file, address=None):
    """Draws `prompt` into `file`."""
    bus = MessageBus(bus_address=address, bus_type=BusType.SESSION, negotiate_unix_fd=True)
    await bus.connect()
    params = {"prompt": Variant("s", prompt), "steps": Variant("u", 10), "seed": Variant("t", 7)}
    options = {"formats": Variant("as", ["png"])}
    (job,), _ = await call(bus, PATH, "Manager", "Generate", "oa{sv}a{sv}", ["/", params, options])
    (result, details), _ = await call(bus, job, "Job", "Wait")
    (files,), fds = await call(bus, job, "Job", "TakeResults", "a{sv}", [{}])
    index, info = files[0]
    # The memory file is sealed: its content cannot change. It is read at an offset of our own.
    size = info["size"].value
    picture = os.pread(fds[index], size, 0)
    assert len(picture) == size
    with open(file, "wb") as out:
        out.write(picture)
    for fd in fds:
        os.close(fd)
    print(f"{file}: {result}, {info['width'].value} x {info['height'].value}, seed {details['seeds'].value[0]}")
    bus.disconnect()


if __name__ == "__main__":
    asyncio.run(generate(*sys.argv[1:4]))
