-- Run once by PostgreSQL's image, when its volume is new.
CREATE DATABASE optuna;
CREATE DATABASE mlflow;
CREATE DATABASE mlflow_auth;
