"""`dalle-jax serve`: a model over HTTP, and a page to use it."""

import ipaddress
import logging
import os
import socket
from typing import Annotated, Literal

from tyro.conf import arg

from dalle_jax.commands.process import prepare_process
from dalle_jax.errors import UserError
from dalle_jax.extras import require
from dalle_jax.serve.config import ServeConfig

TOKEN = "DALLE_JAX_TOKEN"


def serve(
    *,
    model: str = "emoji",
    dtype: Literal["float32", "bfloat16"] = "float32",
    host: str = "127.0.0.1",
    port: int = 8000,
    warm_up: bool = True,
    limits: Annotated[ServeConfig, arg(name="")] = ServeConfig(),
) -> None:
    """Serve a model over HTTP, with a page to use it in a browser.

    Ctrl-C or SIGTERM ends it after it has finished what it accepted. If the environment variable
    DALLE_JAX_TOKEN is set, clients have to send it as a bearer token.

    Args:
      model: A shipped model by name, or the path of a model folder.
      dtype: Type of the prior's kernels in memory; bfloat16 halves them.
      host: Address to listen on; by default only this machine is served.
      port: To listen on; 0 for any that is free.
      warm_up: Compile all sizes of batches before the first request.
      limits: What the server takes on.
    """
    prepare_process()
    require("serve")
    import uvicorn

    import dalle_jax
    from dalle_jax.generate.model_folder import default_captions, shipped_models
    from dalle_jax.serve.app import create_app

    token = os.environ.get(TOKEN) or None
    try:
        listening = socket.create_server((host, port), backlog=1024)
    except OSError as error:
        raise UserError(
            f"nothing can listen on {host}, port {port} ({error.strerror}); choose another --port"
        ) from error
    with listening:
        is_local = ipaddress.ip_address(listening.getsockname()[0]).is_loopback
        log = logging.getLogger("dalle_jax")
        if not is_local and token is None:
            log.warning("whoever reaches %s can use this server; set %s", host, TOKEN)
        loaded = dalle_jax.load(model, dtype=dtype)
        captions = default_captions(model) if model in shipped_models() else ()
        hosts = ("localhost", "127.0.0.1", host) if is_local else ("*",)
        app = create_app(
            loaded, limits, captions=captions, token=token, hosts=hosts, warm_up=warm_up
        )
        print(f"{loaded!r} at http://{host}:{listening.getsockname()[1]}", flush=True)
        settings = uvicorn.Config(app, log_level="warning", limit_concurrency=1024)
        uvicorn.Server(settings).run(sockets=[listening])
