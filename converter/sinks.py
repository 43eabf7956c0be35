"""Which sink a form has."""

from pathlib import Path

from converter.ends import Sink
from converter.plan import Plan
from converter.shard_store import ShardStore
from converter.store import Store


def sink_of(directory: Path, plan: Plan) -> Sink:
    return Store(directory) if plan.form.to == "orbax" else ShardStore(directory, plan)
