"""`dalle-jax watch`: the curves and sheets of a run in progress."""

import contextlib
from pathlib import Path

from tyro.conf import Positional

from dalle_jax.errors import UserError
from dalle_jax.extras import require
from dalle_jax.option_checks import check_output


def watch(
    workdir: Positional[Path],
    *,
    out: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8001,
) -> None:
    """Show the curves and sheets of a run in a browser, refreshed every five seconds.

    Args:
      workdir: Of the run, or of one of its stages.
      out: HTML file to write once instead, which needs no server; None to serve.
      host: Address to listen on; by default only this machine can look.
      port: To listen on; 0 for any that is free.
    """
    check_output("--out", out, ".html")
    require("train")
    from dalle_jax import atomic
    from dalle_jax.watch.page import make_server, page_file

    if out is not None:
        page = page_file(workdir)
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(out, page)
        print(out.resolve())
        return
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a folder; give the --workdir of a run")
    with make_server(workdir, host=host, port=port) as server:
        print(f"{workdir} at http://{host}:{server.server_port}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
