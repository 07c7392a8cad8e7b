-- Run once by PostgreSQL's image, when its volume is new. Each service has a user of its own, who reaches his own
-- databases and no other. psql reads the passwords itself, so that they are in no process list.
\set mlflow `cat /run/secrets/mlflow_database_password`
\set optuna `cat /run/secrets/optuna_database_password`
CREATE USER mlflow PASSWORD :'mlflow';
CREATE USER optuna PASSWORD :'optuna';
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE mlflow_auth OWNER mlflow;
CREATE DATABASE optuna OWNER optuna;
REVOKE CONNECT ON DATABASE mlflow, mlflow_auth, optuna, postgres, template1 FROM PUBLIC;
