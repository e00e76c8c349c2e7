"""Text, tables and sentence pairs to batches: sources -> one store of ragged arrays -> one order -> one loader.

prepared = text.prepare(config)              # or labelled.prepare, parallel.prepare
dataset = MaskedText(prepared, config.data, config.task.objective, config.seed)    # or Encoded, Translations
order = Stream(len(dataset), config.seed, 256)                                     # or Grouped, Rounds
batches = loader.train_batches(dataset, order, Split(256, 16, rank=0, world=1), start_sample=0, workers=1)
"""
