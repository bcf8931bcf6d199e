"""Scores of eval.py's tasks while a stage trains: sft.py --eval_tasks=chains,gsm8k."""
import torch

import eval as evaluation
from configurator import UserError
from model import Motif
from support.ranks import RANK, WORLD, all_gather_object, sync_errors
from support.scores import summarize
from support.tasks import read_questions
from support.tokenizer import BEGIN, Tokenizer

# The optimizer's state and the gathered model lie beside the cache, for which eval.py would take
# 16 GiB on a GPU.
KV_SHARE = 1 / 8  # of what eval.py takes [ours]


class TaskScores:
    """Called with the model, it measures the questions that it has read when it was made."""

    def __init__(self, c, tokenizer: Tokenizer):
        """c: sft.Config."""
        self.c = evaluation.Config(
            tasks=c.eval_tasks, limit=c.eval_limit, benchmark_dir=c.benchmark_dir, chat=True,
            seed=c.seed, run_code=True)
        self.encoder = evaluation.PromptEncoder(tokenizer, tokenizer.special[BEGIN])
        self.tasks = {}  # name -> task, {number: question}
        for name, task in evaluation.select_tasks(self.c).items():
            if task.program:
                raise UserError(f"eval_tasks: {name} runs programs that the model writes; measure "
                                "it by eval.py, after training")
            questions = read_questions(name, task, 0, c.eval_limit, c.benchmark_dir)
            self.tasks[name] = (task, questions)

    @torch.no_grad()
    def __call__(self, model: Motif) -> dict[str, dict[str, float]]:
        """{task: {metric: score}}. The ranks share the questions, so they need not make the same
        forward passes, and each must have the whole model."""
        for module in model.modules():
            if hasattr(module, "unshard"):
                module.unshard()
        kv_cache_tokens = evaluation.default_kv_cache_tokens(model, model.head_weight.device)
        self.c.kv_cache_tokens = max(1, int(KV_SHARE * kv_cache_tokens))

        scores = {}
        for name, (task, questions) in self.tasks.items():
            records = {}
            for of_rank in all_gather_object(sync_errors(self.measure, model, task, questions)):
                records.update(of_rank)
            summary = summarize([records[i] for i in questions])
            scores[name] = {metric: score["value"] for metric, score in summary.items()}
        return scores

    def measure(self, model: Motif, task, questions: dict) -> dict[int, dict]:
        """{number: record} of this rank's questions."""
        mine = {i: questions[i] for i in list(questions)[RANK::WORLD]}
        measure = evaluation.MEASURES[task.kind]
        return dict(measure(task, mine, model, self.encoder, self.c))
