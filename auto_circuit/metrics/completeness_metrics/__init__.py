"""Completeness: does a circuit have all that the model does the task with?"""
