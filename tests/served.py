"""A server in a thread, on the loopback, for tests that need real connections."""

import contextlib
import threading

import uvicorn

from dalle_jax.serve.app import create_app


@contextlib.contextmanager
def served(*args, **options):
    """The address of a server that `create_app` makes of the same arguments."""
    config = uvicorn.Config(create_app(*args, **options), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()
