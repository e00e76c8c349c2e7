"""A linear regression on DeepSpeed: MAE, MSE or Huber's loss under any ZeRO stage and offload, beside its optimum.

deepspeed --num_gpus 2 recipes/linear_regression.py loss=mae                      # scikit-learn's diabetes
deepspeed --num_gpus 2 recipes/linear_regression.py data.path=table.csv data.target=price 'data.drop=[name]'
deepspeed --num_gpus 2 recipes/linear_regression.py data=synthetic data.rows=1e7 zero=stage3 offload=cpu
deepspeed --num_gpus 2 recipes/linear_regression.py parallel=features             # columns over ranks instead of rows

The run directory gets coefficients.csv beside those of the optimum, linear_regression.png and .svg.
"""

from toolkit.config.schema import RunConfig
from toolkit.run.recipe import recipe


@recipe("linear")
def main(config: RunConfig) -> None:
    from studies import linear_regression as study

    from toolkit.engine.start import start_engine
    from toolkit.job import ranks
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
    if ranks.rank() == 0:
        rows = study.coefficients(run, task)
        run.write_csv("coefficients.csv", rows)
        run.console.print(study.listing(rows))
        study.plot(run, rows, run.dir / "linear_regression")


if __name__ == "__main__":
    main()
