"""The command `dalle-jax`."""

from collections.abc import Sequence

from tyro.extras import SubcommandApp

from dalle_jax.commands import (
    compare_models,
    evaluate_model,
    generate_images,
    import_weights,
    inspect_data,
    serve_images,
    train_model,
    watch_run,
)
from dalle_jax.terminal import complaints, show_log_lines

_app, _data, _votes = SubcommandApp(), SubcommandApp(), SubcommandApp()
_app.command(generate_images.generate)
_app.command(generate_images.edit)
_app.command(evaluate_model.evaluate)
_app.command(serve_images.serve)
_app.command(train_model.train)
_app.command(watch_run.watch)
import_weights.add_to(_app)
_app.command(_data, name="data", help="Look after your own images.")
_data.command(inspect_data.check)
_data.command(inspect_data.overlap)
_app.command(_votes, name="votes", help="Let people compare two models.")
_votes.command(compare_models.page)
_votes.command(compare_models.count)


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command; errors of the user end it with one sentence and exit status 2."""
    description = "Generate images from captions, and train models that do."
    show_log_lines()
    with complaints("dalle-jax"):
        _app.cli(prog="dalle-jax", description=description, args=args, sort_subcommands=False)
