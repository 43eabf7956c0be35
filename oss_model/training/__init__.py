"""What fine-tuning is made of, beside the model: chats, packed rows, steps, the load of the router.

`scripts/examples/finetune.py` puts it together.
"""

from oss_model.training.chat import Answers, ChatTemplate, Document, Tokenizer, read_documents
from oss_model.training.data import Data
from oss_model.training.loop import Training, train
from oss_model.training.packing import epoch_rows, pack
from oss_model.training.router import dead, evenness, load_balancing_loss
from oss_model.training.steps import Batch, Stepped, eval_step, optimizer, schedule, train_step

__all__ = [
    "Answers",
    "Batch",
    "ChatTemplate",
    "Data",
    "Document",
    "Stepped",
    "Tokenizer",
    "Training",
    "dead",
    "epoch_rows",
    "eval_step",
    "evenness",
    "load_balancing_loss",
    "optimizer",
    "pack",
    "read_documents",
    "schedule",
    "train",
    "train_step",
]
