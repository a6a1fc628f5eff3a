import numpy as np
import pytest
import tiny

from dalle_jax.errors import UserError
from dalle_jax.evaluate.pairs import FOLDER_PX, open_painter, shared_captions
from dalle_jax.image.pixels import encode_png


@pytest.fixture
def folders(tmp_path):
    found = []
    for name, captions in {"a": ("red apple", "cat"), "b": ("cat", "tree")}.items():
        folder = tmp_path / name
        folder.mkdir()
        for i, caption in enumerate(captions):
            (folder / f"{i}.png").write_bytes(encode_png(np.full((9, 9, 3), 100 * i, np.uint8)))
            (folder / f"{i}.txt").write_text(caption)
        found.append(open_painter(str(folder)))
    return found


def test_two_folders_are_compared_on_the_captions_that_both_have(folders, tmp_path):
    assert shared_captions(folders, tmp_path / "unused", must=False) == ["cat"]
    pictures = [folder.paint(["cat"]) for folder in folders]
    assert [int(picture.max()) for picture in pictures] == [100, 0]
    assert pictures[0].shape == (1, FOLDER_PX, FOLDER_PX, 3)


def test_a_model_draws_what_is_listed_and_a_folder_has_to_have_it(folders, tmp_path):
    tiny.model().save(tmp_path / "tiny")
    model = open_painter(str(tmp_path / "tiny"), seed=3)
    listed = tmp_path / "captions.txt"
    listed.write_text("cat\n\ncat\nred apple\n")
    assert shared_captions([model, folders[0]], listed, must=True) == ["cat", "red apple"]
    assert shared_captions([model, folders[1]], listed, must=False) == ["cat", "tree"]
    np.testing.assert_array_equal(model.paint(["cat"]), tiny.model().generate("cat", seed=3)[:, 0])
    with pytest.raises(ValueError, match=r"b has no picture for 1 of 2 captions, such as 'red"):
        shared_captions([model, folders[1]], listed, must=True)
    listed.write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"captions.txt is not in UTF-8 \(.*\); save it so"):
        shared_captions([model], listed, must=True)
    listed.write_text("")
    with pytest.raises(ValueError, match="there are no captions that both sides have"):
        shared_captions([model], listed, must=True)
