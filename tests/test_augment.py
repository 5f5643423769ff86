"""Normalisation and augmentation against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import PIPELINE, tiny_data

from hsee_jax.data.pipeline import AUGMENTATIONS, normalize
from hsee_jax.engine.round import client_batch

NOISY = PIPELINE._replace(augment=AUGMENTATIONS.make("noise"))


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


def test_each_client_and_step_has_draws_of_its_own():
    """Of the same samples; steps count over the run, and 3 may be in a later round."""
    data, rows, mask = tiny_data(4), jnp.arange(4), jnp.ones(4, bool)

    def inputs(client, step):
        who = jnp.int32(client), jnp.int32(step)
        batch = client_batch(NOISY, jax.random.key(0), *who, data, rows, mask)
        return np.asarray(batch.inputs)

    np.testing.assert_array_equal(inputs(1, 3), inputs(1, 3))
    draws = [inputs(client, step) for client in (0, 1) for step in (0, 1, 3)]
    for n, one in enumerate(draws):
        for other in draws[:n]:
            assert not np.any(one == other)


@pytest.mark.parametrize("noise_std", [0.1, 2.0])
def test_the_noise_has_the_deviation_that_was_asked(noise_std):
    """Of 40 000 draws the deviation is within 2 %, more than 5 of its own."""
    zeros = jnp.zeros((100, 20, 20, 1))
    drawn = AUGMENTATIONS.make("noise", options={"noise_std": noise_std})
    noise = np.asarray(drawn(jax.random.key(0), zeros))
    np.testing.assert_allclose(noise.std(), noise_std, rtol=0.02)
    assert abs(noise.mean()) < 0.02 * noise_std
