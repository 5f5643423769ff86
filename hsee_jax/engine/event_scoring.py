"""Scores of clients that see one event each in its own way, and of their server."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.core.reuse import reused
from hsee_jax.core.trees import row_of
from hsee_jax.core.types import Array, Batch, Dataset
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.engine.scoring import (
    Answers,
    BothMetrics,
    Rows,
    ScoresFn,
    Task,
    client_answers,
    score_logits,
)
from hsee_jax.federation.branch import Branch, forward
from hsee_jax.federation.crossing import decode
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.junction import Junction, finite_views
from hsee_jax.parallel.mesh import SAME, to_devices, to_host


@reused
def make_event_scores(
    federation: Federation, junction: Junction, pipeline: InputPipeline
) -> ScoresFn:
    """Compile the scores of the clients of one cut, all of which see each sample.

    The exit of a client answers from its own view. The server answers from the views
    of all of them that are finite, so its score is the same for all.

    Args:
      federation: the clients.
      junction: how the server reads the views.
      pipeline: makes batches of samples.
    """
    client_spec, server_spec = federation.specs(0)
    wide, count = junction.widen(server_spec), len(federation.groups[0].ids)

    def on_batch(
        clients: Branch,
        server: Branch,
        data: Dataset,
        views: Array,
        row: tuple[Array, Array],
    ) -> BothMetrics:
        indices, mask = row

        def on_client(own: tuple[Branch, Array]) -> tuple[Batch, Answers]:
            client, who = own
            batch = pipeline.evaluation(data, indices, mask, who)
            answers = client_answers(client_spec, client, batch.inputs, mask)
            return batch._replace(inputs=decode(server_spec, answers.message)), answers

        batches, answers = jax.lax.map(on_client, (clients, views))
        present = finite_views(batches.inputs, batches.mask)
        merged = junction.merge(batches.inputs, present)
        _, logits, _ = forward(wide, server, merged, mask, train=False)
        score = jax.vmap(score_logits, (0, None, None, None))
        return score(answers, logits, batches.labels[0], mask)

    @jax.jit
    def on_rows(
        clients: Branch, server: Branch, data: Dataset, views: Array, rows: Rows
    ) -> BothMetrics:
        own, views = jax.tree.map(lambda leaf: leaf[:count], (clients, views))
        sums = jax.lax.map(partial(on_batch, own, server, data, views), tuple(rows))
        return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), sums)

    def scores(task: Task) -> list[BothMetrics | None]:
        state = task.state
        rows, views = to_devices((task.rows, task.views), federation.mesh, SAME)
        sums = to_host(
            on_rows(state.clients[0], state.servers[0], task.data, views, rows)
        )
        empty = len(task.taken) - count
        assert np.array_equal(task.taken, np.arange(len(task.taken)) < count)
        members = [row_of(sums, slot) for slot in range(count)]
        return [*members, *[None] * empty]

    return scores
