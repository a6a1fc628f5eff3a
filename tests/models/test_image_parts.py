import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models.image_parts import map_images


@pytest.mark.parametrize("numbers, size", [(1000, 6), (60, 6), (59, 3), (29, 2), (0, 1)])
def test_parts_are_as_large_as_may_be_and_give_what_the_whole_gives(numbers, size):
    sizes = set()

    def f(x, pair):
        sizes.add(len(x))
        return x + pair[0], {"twice": 2 * pair[1]}

    x, y, z = (jnp.arange(6 * n).reshape(6, n) for n in (3, 3, 1))
    found, other = map_images(f, x, (y, z), numbers_each=10, numbers=numbers)
    assert sizes == {size}
    np.testing.assert_array_equal(found, x + y)
    np.testing.assert_array_equal(other["twice"], 2 * z)
