"""Which sink a form has."""

from pathlib import Path

from converter.bucket_store import BucketStore
from converter.ends import Sink
from converter.plan import Plan
from converter.shard_store import ShardStore
from converter.store import Store
from oss_model.buckets import GsPath


def sink_of(directory: Path, plan: Plan) -> Sink:
    if isinstance(directory, GsPath):
        return BucketStore(directory)
    return Store(directory) if plan.form.to == "orbax" else ShardStore(directory, plan)
