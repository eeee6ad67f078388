"""Two-sample tests: whether the noise that is drawn has the law it should have.

order_statistics  the embedding drawn by order statistics, against the dense law
carried           one noise over all steps, against dense tensors
two_sample        the tests themselves
"""
