import numpy as np
import pytest
import tiny

from dalle_jax.errors import UserError
from dalle_jax.evaluate.image_providers import FOLDER_PX, open_image_provider, shared_captions
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
        found.append(open_image_provider(str(folder)))
    return found


def test_two_folders_are_compared_on_the_captions_that_both_have(folders, tmp_path):
    assert shared_captions(folders, tmp_path / "unused", required=False) == ["cat"]
    images = [folder.images(["cat"]) for folder in folders]
    assert [int(image.max()) for image in images] == [100, 0]
    assert images[0].shape == (1, FOLDER_PX, FOLDER_PX, 3)


def test_a_model_samples_what_is_listed_and_a_folder_has_to_have_it(folders, tmp_path):
    tiny.model().save(tmp_path / "tiny")
    model = open_image_provider(str(tmp_path / "tiny"), seed=3)
    listed = tmp_path / "captions.txt"
    listed.write_text("cat\n\ncat\nred apple\n")
    assert shared_captions([model, folders[0]], listed, required=True) == ["cat", "red apple"]
    assert shared_captions([model, folders[1]], listed, required=False) == ["cat", "tree"]
    np.testing.assert_array_equal(model.images(["cat"]), tiny.model().generate("cat", seed=3)[:, 0])
    with pytest.raises(ValueError, match=r"b has no image for 1 of 2 captions, such as 'red"):
        shared_captions([model, folders[1]], listed, required=True)
    listed.write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"captions.txt is not in UTF-8 \(.*\); save it so"):
        shared_captions([model], listed, required=True)
    listed.write_text("")
    with pytest.raises(ValueError, match="there are no captions that both have"):
        shared_captions([model], listed, required=True)
