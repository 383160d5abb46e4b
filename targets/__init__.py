"""Forms of output and the engines that load them, one a file, plus the Hub."""
