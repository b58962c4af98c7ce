"""The engine: one thread owns the model, batches requests and schedules their prefills. Knows no HTTP."""
