"""Fine-tune a language model that knows its risk: ``train(TrainConfig(...))``, or ``selfdoubt train``."""
