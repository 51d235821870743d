"""From exam questions and a checkpoint to preference pairs: sample, judge, pair, filter."""
