"""`dalle-jax votes`: let people compare two models."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from dalle_jax.commands.process import prepare_process
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.option_checks import check_input, check_output, check_seed, save_outputs
from dalle_jax.terminal import bar


def page(
    first: Positional[str],
    second: Positional[str],
    *,
    captions: Path | None = None,
    out: Path = Path("votes.html"),
    seed: int = 0,
    sampling: Annotated[SamplingConfig, arg(name="")] = SamplingConfig(),
) -> None:
    """Write a web page on which people compare two models blind, and the key to it.

    The page is one file that works without a network; voters save a file with their votes.

    Args:
      first: A shipped model, a model folder, or a folder of images with captions.
      second: The other one.
      captions: Text file, one caption a line; None for the list of the shipped emoji model, or for
        all that both have if one of them is a folder of images.
      out: The page, ending in .html; the key goes beside it, to .key.json.
      seed: Of the samples, the order of pairs, and of left and right.
      sampling: How models sample codes.
    """
    check_input("--captions", captions)
    check_output("--out", out, ".html")
    check_seed(seed)
    prepare_process()
    from dalle_jax.evaluate.image_providers import open_image_provider, shared_captions
    from dalle_jax.evaluate.votes import write_page
    from dalle_jax.generate.model_folder import CAPTIONS, SHIPPED

    providers = [
        open_image_provider(name, seed=seed, sampling=sampling) for name in (first, second)
    ]
    file = captions or SHIPPED / "emoji" / CAPTIONS
    shared = shared_captions(providers, file, required=captions is not None)
    with bar("Generating") as progress:
        images = [provider.images(shared, progress) for provider in providers]
    names = first, second
    save_outputs([(out, lambda path: write_page(path, shared, *images, names=names, seed=seed))])
    key = out.with_suffix(".key.json")
    print(f"{len(shared)} pairs: {out.resolve()}; keep {key} to yourself")


def count(key: Positional[Path], votes: Positional[tuple[Path, ...]]) -> None:
    """Count votes by majority, with 95 % intervals.

    Args:
      key: The file .key.json beside the page.
      votes: The files that voters saved.
    """
    for file in (key, *votes):
        check_input("a file of votes", file)
    from dalle_jax.evaluate.votes import count_votes

    tallies, remarks = count_votes(key, votes)
    for line in (*tallies, *remarks):
        print(line)
