"""A grid of methods, hyper-parameters, seeds and source domains: trained, selected on ID validation, and compared."""
