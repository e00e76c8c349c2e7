"""Fine-tune a pretrained encoder: a task of GLUE, SQuAD, named entities, multiple choice, or data of your own.

deepspeed recipes/finetune.py task=sst2 model.weights=google-bert/bert-base-uncased
deepspeed recipes/finetune.py task=classify data.train=reviews.csv data.eval=more.csv data.columns.label=stars \
    model.weights=runs/bert seeds=[1,2,3]
"""

from toolkit.config.schema import RunConfig
from toolkit.run.recipe import recipe


@recipe("classify", "multi_label", "regress", "tag", "span_qa", "choose")
def main(config: RunConfig) -> None:
    from toolkit.train.several import train_all

    train_all(config)


if __name__ == "__main__":
    main()
