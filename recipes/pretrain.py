"""Pretrain BERT with masked LM and next sentence prediction.

deepspeed recipes/pretrain.py model=bert_base zero=stage2 data=text data.path='docs/*.txt'
"""

from toolkit.config.schema import RunConfig
from toolkit.run.recipe import recipe


@recipe("pretrain")
def main(config: RunConfig) -> None:
    from toolkit.engine.start import start_engine
    from toolkit.models.build import build_model
    from toolkit.run.directory import Run
    from toolkit.tasks import build_task
    from toolkit.train.loop import fit

    run = Run.open(config)
    task = build_task(run)
    engine = start_engine(build_model(run, task), task, run)
    fit(engine, task, run)


if __name__ == "__main__":
    main()
