"""Normalisation and augmentation against numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.data.pipeline import AUGMENTATIONS, normalize


def test_normalize_centres_and_scales_each_channel():
    images = np.arange(2 * 3 * 3 * 2, dtype=np.uint8).reshape(2, 3, 3, 2)
    ours = normalize(jnp.asarray(images), (0.1, 0.2), (0.5, 0.25))
    expected = (images / 255 - np.array([0.1, 0.2])) / np.array([0.5, 0.25])
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_each_image_is_a_window_of_itself_padded_and_perhaps_flipped():
    images = np.random.default_rng(0).standard_normal((40, 6, 6, 1), np.float32)
    key = jax.random.key(0)
    kinds = {
        kind: np.asarray(jax.jit(AUGMENTATIONS.make(kind))(key, images))
        for kind in ("none", "crop", "crop_flip")
    }
    np.testing.assert_array_equal(kinds["none"], images)
    for kind, flips in (("crop", (1,)), ("crop_flip", (1, -1))):
        seen = set()
        for image, result in zip(images, kinds[kind], strict=True):
            matches = []
            for flip in flips:
                padded = np.pad(image[:, ::flip], ((4, 4), (4, 4), (0, 0)))
                matches += [
                    (flip, row, column)
                    for row in range(9)
                    for column in range(9)
                    if (padded[row : row + 6, column : column + 6] == result).all()
                ]
            assert len(matches) >= 1
            seen.add(matches[0])
        assert len(seen) > 20
        assert {flip for flip, _, _ in seen} == set(flips)
