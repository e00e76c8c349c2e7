"""Train an encoder-decoder Transformer to translate, or fine-tune one; BLEU by sacreBLEU.

deepspeed recipes/translate.py experiment=multi30k data.path=/data/translation/multi30k
"""

from toolkit.config import RunConfig
from toolkit.launch import recipe


@recipe
def main(config: RunConfig) -> None:
    from toolkit.engine import Engine
    from toolkit.models.build import build_model
    from toolkit.run import Run
    from toolkit.tasks import build_task
    from toolkit.train import fit

    run = Run.open(config)
    task = build_task(run)
    engine = Engine.start(build_model(run, task), task, run)
    fit(engine, task, run)


if __name__ == "__main__":
    main()
