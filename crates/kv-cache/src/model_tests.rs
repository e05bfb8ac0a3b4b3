//! Random operations against oracles of a few lines: the pool's states, the eviction order, and tables in several groups.

mod pool;
mod tables;
