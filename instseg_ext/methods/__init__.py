"""One room per method; each shows a single ``METHOD`` record. Only ``instseg_ext.zoo`` knows them all."""
