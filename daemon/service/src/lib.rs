//! The BlockLoRA daemon.
