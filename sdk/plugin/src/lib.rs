//! Write plugins for BlockLoRA: merge strategies, trainers, samplers.
