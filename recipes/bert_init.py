"""What a BERT is worth to a translator made of two: all of it random, its encoder from BERT, or both halves.

deepspeed recipes/bert_init.py experiment=multi30k_bert data.path=/data/translation/multi30k model.weights=runs/bert

The same seed, data and shape each time (Clinchant et al. 2019, arXiv 1909.12744). The run directory gets a run for
each, and bert_init.md, .csv, .png and .svg: loss and BLEU on held-out pairs by optimizer step.
"""

from toolkit.config.schema import RunConfig
from toolkit.run.recipe import recipe

NAMES = {"none": "random", "encoder": "BERT encoder", "both": "BERT encoder and decoder"}
KEYS = ["eval_loss", "eval_bleu"]


def configs(config: RunConfig, folder: str) -> dict[str, RunConfig]:
    """A run in ``folder`` for each beginning, by its name in words."""
    models = {init: config.model.model_copy(update={"init": init}) for init in NAMES}
    return {
        NAMES[init]: config.model_copy(update={"model": model, "output_dir": folder, "name": init})
        for init, model in models.items()
    }


@recipe("translate")
def main(config: RunConfig) -> None:
    from studies.bert_init import markdown, rows

    from toolkit.errors import ConfigError
    from toolkit.job import ranks
    from toolkit.report import figures
    from toolkit.run.directory import Run
    from toolkit.train.several import in_turn

    if config.model.weights is None:
        raise ConfigError("model.weights is not set: this compares translators made of a BERT. Set it to that BERT.")
    whole = Run.open(config)
    runs = dict(zip(NAMES.values(), in_turn(whole, configs(config, str(whole.dir))), strict=True))
    if ranks.rank() == 0:
        table = rows(runs, KEYS)
        whole.write_csv("bert_init.csv", table)
        whole.write_text("bert_init.md", markdown(table))
        figures.curves(runs, KEYS, whole.dir / "bert_init", "Translators made of two BERTs, by what they begin with")
    whole.console.print(f"Run directory: {whole.dir}")


if __name__ == "__main__":
    main()
