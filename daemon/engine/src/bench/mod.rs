//! Benchmarks of the engine, on random weights of real shapes.
