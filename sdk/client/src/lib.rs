//! A typed, asynchronous client of the BlockLoRA daemon.
