"""Pretrain BERT with masked LM and next sentence prediction.

deepspeed recipes/pretrain.py model=bert_base zero=stage2 data=text data.path='texts/*.txt'
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
    from toolkit.train.own_plan import begin

    run = Run.open(config)
    task = build_task(run)
    plan = begin(run, task)
    model = build_model(run, task, plan.ds)
    engine = start_engine(model, task, run, plan.ds)
    fit(engine, task, run, plan)


if __name__ == "__main__":
    main()
