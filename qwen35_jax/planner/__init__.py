"""What a step costs on devices that are not there: their descriptions, the compilers' answers, bytes and rooflines."""
