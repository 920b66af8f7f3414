"""One room per method, each with a single ``METHOD`` record; only the zoo knows them all."""
