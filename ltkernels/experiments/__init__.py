"""Studies on top of the trainer: `fdg` (does it pay to choose, by Feature Diversity Gain, the samples that complete the tail?) and
`similarity` (is it scarcity that hurts a minority class, or that another class looks like it?). They need the extra `experiment`."""
