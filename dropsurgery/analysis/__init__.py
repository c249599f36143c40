"""What users find out about models: certify them, explain one, compare recipes over many."""
