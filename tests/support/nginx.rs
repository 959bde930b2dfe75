//! A web server that we did not write.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::lab::Running;

/// Starts nginx in a namespace: one process that serves the files in `dir`, where it keeps its own as well.
pub fn nginx(ns: &str, addr: &str, dir: &Path) -> Result<Running> {
    let (path, conf) = (dir.display(), dir.join("nginx.conf"));
    let text = format!(
        "daemon off; master_process off; pid {path}/pid; error_log stderr notice; events {{ }}\n\
         http {{ access_log off; client_body_temp_path {path}/body; proxy_temp_path {path}/proxy;\n\
         fastcgi_temp_path {path}/fastcgi; uwsgi_temp_path {path}/uwsgi; scgi_temp_path {path}/scgi;\n\
         server {{ listen {addr}; root {path}; }} }}\n"
    );
    fs::write(&conf, text).context("writing what nginx is told")?;
    let mut command = Command::new("ip");
    command.args(["netns", "exec", ns, "nginx", "-e", "stderr", "-p"]).arg(dir).arg("-c").arg(conf);
    let mut nginx = Running::start(&mut command)?;
    // It listens before it says so.
    nginx.wait_for("nginx to start", |line| line.contains("using the \"") || line.contains("emerg"))?;
    Ok(nginx)
}
