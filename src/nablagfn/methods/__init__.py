"""The methods: objectives and estimators, and the one place that knows them all by name."""
