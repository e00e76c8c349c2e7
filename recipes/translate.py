"""Train an encoder-decoder Transformer to translate, or fine-tune one; BLEU by sacreBLEU.

deepspeed recipes/translate.py experiment=multi30k data.path=/data/translation/multi30k
deepspeed recipes/translate.py task=translate data.train=corpus/train data.eval=corpus/dev task.source=de \
    task.target=en model=transformer_base seeds=[1,2,3]
"""

from toolkit.config.schema import RunConfig
from toolkit.run.recipe import recipe


@recipe("translate")
def main(config: RunConfig) -> None:
    from toolkit.train.several import train_all

    train_all(config)


if __name__ == "__main__":
    main()
