"""What is to be done: a source and a form, opened and looked at before anything is written."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path

from converter import configs
from converter.chunks import Reader
from converter.ends import Source
from converter.form import Form
from converter.manifest import fingerprint
from converter.plan import Plan, make_plan
from converter.source import closed_on_error, companions, open_base, open_source
from oss_model.buckets import path_of


@dataclasses.dataclass(frozen=True)
class Job:
    """
    Attributes:
      base: see `Form.like`.
      before: the fingerprint of the source.
      config: the text of config.json, where it is not a companion.
      companions: files to be copied.
      notes: what whoever uses the result should know.
    """

    source: Source
    base: Source | None
    plan: Plan
    before: dict
    config: bytes | None
    companions: list[Path]
    notes: list[str]

    def reader(self) -> Reader:
        return Reader(self.source, self.plan.form.quantizer, self.base)

    def fingerprint(self) -> dict:
        """Of what is read, as it is now."""
        return fingerprint(self.source, self.plan.form, [*(self.base.files if self.base else ()), *self.companions])

    @property
    def read_nbytes(self) -> int:
        """Of all that is read of the source."""
        return sum(math.prod(e.checkpoint_shape) * self.source.dtype(e).itemsize for e in self.source.entries())


@contextlib.contextmanager
def open_job(src: str | os.PathLike, form: Form, tokenizer: str | os.PathLike | None = None) -> Iterator[Job]:
    """
    Args:
      tokenizer: a directory whose tokenizer, template and generation_config.json are copied, instead of the source's.

    Raises:
      InputError: if there is no such source, or it cannot be brought into this form.
    """
    source = open_source(src, form)
    with closed_on_error(source):
        plan, base = make_plan(source, form), open_base(form, source)
        files = companions(source, None if tokenizer is None else path_of(tokenizer))
        config, notes = configs.config_of(source, form), configs.notes(source, form, files)
        job = Job(source, base, plan, {}, config, files, notes)
        job = dataclasses.replace(job, before=job.fingerprint())
    try:
        yield job
    finally:
        source.close()
        if base is not None:
            base.close()
