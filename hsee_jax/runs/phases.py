"""The phases of a run: its rounds with the same cuts, and the changes between them.

A run whose cuts do not change has one phase. Each phase has an `Experiment` of its own
on the same data. Phases with the same cuts share it, and so its compiled programs.
"""

from typing import Any

import jax
import numpy as np

from hsee_jax.engine.store import Store
from hsee_jax.federation.federation import Federation, Group
from hsee_jax.federation.recut import Exits, Shelf, recut
from hsee_jax.federation.schedule import Cuts
from hsee_jax.federation.state import RunState, init_clients
from hsee_jax.parallel.mesh import to_host
from hsee_jax.runs.build import build_strategy, make_store
from hsee_jax.runs.experiment import Experiment
from hsee_jax.systems.traffic import traffic_of


class Phases:
    """The experiments of a run, each built when a round first needs it."""

    def __init__(self, experiment: Experiment) -> None:
        """Begin with the experiment of the first round."""
        self._built = {experiment.schedule.cuts[0]: experiment}
        self._first, self._schedule = experiment, experiment.schedule

    def at(self, number: int) -> Experiment:
        """Return the experiment of a round; rounds count from 1."""
        cuts = self._schedule.cuts_in(number)
        if cuts not in self._built:
            self._built[cuts] = _with_cuts(self._first, cuts)
        return self._built[cuts]

    def move(
        self, state: Any, shelf: Shelf, before: Experiment, after: Experiment
    ) -> tuple[Any, Shelf]:
        """Return state and shelf with the cuts of another phase, see `recut`.

        Args:
          state: in the form of the store of ``before``.
          shelf: the exits of cuts that clients have left.
          before: the experiment of the rounds so far.
          after: the experiment of the next round.

        Returns:
          The state in the form of the store of ``after``, and the shelf.
        """
        fresh = after.store.to_checkpoint(after.init())
        moved, shelf = recut(
            to_host(before.store.to_checkpoint(state)),
            shelf,
            to_host(fresh),
            before=before.federation.groups,
            after=after.federation.groups,
            weights=before.client_weights(),
            shared=before.strategy.shared,
        )
        return after.store.from_checkpoint(_placed(moved, after.store)), shelf

    def shelf_shapes(self, number: int) -> Shelf:
        """Return the shapes and dtypes of the shelf in a round."""
        left = self._schedule.left_before(number)
        federation = self._first.federation
        return {
            str(cut): _exits_of(federation, Group(cut, left[cut]))
            for cut in sorted(left, key=str)
        }


def _with_cuts(experiment: Experiment, cuts: Cuts) -> Experiment:
    """Build an experiment with other cuts on the same data."""
    config, federation = experiment.config, experiment.federation.with_cuts(cuts)
    strategy = build_strategy(config, federation)
    slots, store = make_store(config, federation, strategy)
    return experiment._replace(
        federation=federation,
        strategy=strategy,
        manifest=[share._replace(cut=cuts[share.id]) for share in experiment.manifest],
        slots=slots,
        store=store,
        traffic=traffic_of(federation, strategy, store.checkpoint_shapes()),
        round_fn=experiment.compilers.make_round(strategy),
        evaluate_fn=experiment.compilers.make_evaluation(federation, strategy),
    )


def _placed(state: RunState, store: Store) -> RunState:
    """Put a state on the devices that a store keeps it on."""

    def put(leaf: Any, like: Any) -> Any:
        return jax.device_put(leaf, like.sharding)

    return jax.tree.map(put, state, store.checkpoint_shapes())


def _exits_of(federation: Federation, group: Group) -> Exits:
    """Return the shapes of the exits of a group's clients."""
    alone = federation._replace(groups=(group,), mesh=None)
    (client,) = jax.eval_shape(
        lambda key: init_clients(alone, key, None, None), jax.random.key(0)
    )
    ids = jax.ShapeDtypeStruct((len(group.ids),), np.int32)
    return Exits(ids, client.head, client.link)
