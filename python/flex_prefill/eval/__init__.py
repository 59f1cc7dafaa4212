"""What a pattern costs in accuracy: RULER, InfiniteBench and retrieval, through lm-eval.

``flexprefill eval`` is the command (docs/eval.md). Nothing here is imported by ``import
flex_prefill``; lm-eval comes with ``pip install 'flex_prefill[eval]'``.

  tasks.py          the tasks by name and suite
  ruler.py          RULER's 13 tasks, samples by lm-eval's own generators
  infinitebench.py  ten tasks of InfiniteBench: prompts, metrics, what can be made without files
  data.py           the folder of texts and files that tasks read, and where they come from
  lm.py             lm-eval's Hugging Face model with an audit and a journal of replies
  runner.py         which cells there are to compute, resuming, results
  quick.py          the built-in model's quick suite and what it must reproduce
  report.py         table and plots
"""
