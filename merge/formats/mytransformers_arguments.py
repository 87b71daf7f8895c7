"""The training arguments that MyTransformers writes into config.json: read, ignored and refused ones.

Source of the names: common/parser.py and every args.NAME that the trainer sets, over the whole history of github
hhnqqq/MyTransformers to 2025-11. The trainer builds the layers of the first variant whose use_* flag is set.
"""

from __future__ import annotations

from adapter_merge.methods.adapter import MethodName

from .known_settings import KnownSettings

# The supported variants, in the order of MyTransformers' LORA_VARIANTS.
VARIANTS = {
    "use_dora": MethodName.DORA,
    "use_rslora": MethodName.RSLORA,
    "use_pissa": MethodName.PISSA,
    "use_olora": MethodName.OLORA,
    "use_milora": MethodName.MILORA,
    "use_dude": MethodName.DUDE,
}
_READ = """
bf16 default_dtype fp16 lora_rank lora_scaler milora_n_iters pissa_n_iters rope_theta run_lora_in_fp32
"""
_REFUSED_VARIANTS = """
use_adalora use_aurora use_bslora use_delora use_delta_lora use_dense_lora use_dralora use_e2lora use_eva use_goat
use_gora use_hira use_increlora use_loda use_loha use_lokr use_lora_da use_lora_dash use_lora_ga use_lora_ga_pro
use_lora_moe use_lora_one use_lora_sb use_lora_share use_loraga_pro use_loran use_me_lora use_mola use_mora
use_mos_lora use_nlora use_nora use_nzlora use_plora use_prolora use_ralora use_randlora use_rasa
use_rasamoe use_ridgelora use_sharelora use_sinelora use_tdlora use_tied_lora use_vera
"""
_REFUSED = {
    "relora_steps": "ReLoRA (it merges into the base while it trains)",
    "relora_counts": "ReLoRA (it merges into the base while it trains)",
    "plora_steps": "PLoRA (it merges into the base while it trains)",
    "rasa_moe": "RaSA with experts",
    "std_normalize_lora": "factors that are normalised while they train",
    "use_qlora": "QLoRA beside adapted weights that its layers quantise to fp4 (Params4bit's default; the layers' NF4 "
    "does not reach it) with double quantisation",
    "train_pi": "a model whose positions were interpolated",
    "partial_ckpt_path": "training that went on from another checkpoint than the base",
}
# Paths, data, logging, the optimiser, and arguments of variants that are off.
_IGNORED = """
activation_checkpoint adalomo_lr all_reduce_loss apply_chat_template atten_type auto_warmup_rate auto_warmup_steps
aux_loss_coeff batch_size_per_gpu batching_stretegy beta1 beta2 betas bslora_forward_method bslora_inter_shared_rank
bslora_intra_shared_rank bslora_share_size ckpt_path clip_grad_max_norm clip_grad_norm_type csv_monitor
cv_dataset_name data_path dataset_class_name dataset_input_field dataset_name dataset_output_field dataset_path
dataset_seed dataset_weights deepscale deepscale_config deepspeed deepspeed_config delora_lambda deltaT
delta_lora_start_steps delta_lora_update_ratio disable_list disable_zero_optimizer diy_optimizer ds_config_path
ds_steps_per_print e2lora_similarity_threshold early_stop_redist_metric early_stop_sim_thresh enable_list
encode_single_gene epochs eps eva_early_stop_redist_metric eva_early_stop_sim_thresh eva_log_convergence_stats
eva_n_steps eva_rho eva_scale_by_singular_values eva_whiten eval_batch_size_per_gpu eval_dataset_name
eval_dataset_path eval_interval eval_max_len eval_max_src_len eval_read_nums experiment_name from_pretrained
fuse_linear_loss galore_per_layer galore_rank galore_scaler global_rank goat_eta goat_init_cof goat_init_type goat_rho
goat_scaling_type gora_adaptive_lr_selection gora_adaptive_n_selection gora_allocate_stretagy
gora_convergence_threshold gora_dynamic_scaling gora_features_func gora_importance_type gora_init_method gora_lr
gora_max_rank gora_min_rank gora_min_steps gora_n_step_gradient gora_n_steps gora_rank_stablize gora_scale_by_lr
gora_scale_importance gora_softmax_importance gora_stable_gemma gora_temperature gpu_count gradient_accumulation_steps
gradient_est_batch_size gradient_est_n_steps head_dim head_num hidden_size huggingface init_r lambda_b_init_method
lambda_d_init_method len_train_dataloader local_rank log_convergence_stats log_flops lokr_decompose_weight_c lokr_k
lora_dash_index lora_dash_init_t lora_dropout lora_fa lora_ga_n_steps lora_ga_pro_dynamic_scaling
lora_ga_pro_rank_stablize lora_ga_reset_weight lora_ga_scale_method lora_moe_aux_loss_coeff lora_moe_n_experts
lora_moe_top_k lora_one_n_steps lora_one_reset_weight lora_plus_scaler lora_reset_weight loran_amp loran_freq loss_fct
lr lr_decay_iters lr_decay_ratio lr_decay_style lr_group_patterns lr_group_scales lr_group_values max_len max_src_len
me_lora_forward_method me_lora_n_split me_lora_usage meta_prompt mini_batches mode model_name model_name_or_path
mola_type monitor_file_path mora_type multimodal multimodal_encode_fp32 multimodal_k_tokens multimodal_model_ckpt_path
multimodal_projector_layers multimodal_projector_type multimodal_sample_mode multimodal_tokenizer_name
multimodal_tokenizer_path nora_n_iters not_clip_grad_norm num_global_update_steps num_layers num_micro_update_steps
num_pp_stages num_sp_stages num_update_steps num_warmup_steps nzlora_init_scale_a nzlora_init_scale_b
offload_optimizer offload_param optim_type orth_reg_weight output_path pad_id param_to_save params_to_save
pissa_keep_init_weights plora_momentum postfix prefix profile_log_dir prolora_repeat_times prolora_shared_rank
prompt_path ralora_allocate_by_erank ralora_cumulative_variance_threshold ralora_disable_n_split
ralora_dynamic_scaling ralora_erank_max_power ralora_features_func ralora_forward_method ralora_importance_type
ralora_max_rank ralora_min_rank ralora_rank_stablize ralora_svd_threshold randlora_sparse_factor randlora_use_sparse
rasa_shared_lora_rank read_nums read_start_step relora_auto_warmup_ratio relora_auto_warmup_steps
relora_fully_reset_optimizer relora_optimizer_magnitude_pruning relora_optimizer_random_pruning relora_reset_optimizer
relora_warmup_steps replace_modules rho save_epoch save_interval save_trainable scale_by_singular_values seed
sharelora_share_part show_avg_loss_step show_loss_step sinelora_freq skip_eval target_r task_name tb_log_dir
tdlora_allocate_stretagy tdlora_dynamic_scaling tdlora_features_func tdlora_importance_type tdlora_init_method
tdlora_lr tdlora_max_rank tdlora_min_rank tdlora_n_steps tdlora_rank_stablize tdlora_scale_by_lr
tdlora_scale_importance tdlora_softmax_importance tdlora_stable_gemma tdlora_temperature tensorboard test_code tfinal
tinit tokenizer_name tokenizer_path top_h tqdm train_dataset_name train_dataset_path train_iters use_galore use_lora
use_lora_fa use_lora_plus use_lora_pro variant vera_init_unique_weights wandb wandb_api_key wandb_cache_dir wandb_dir
wandb_mode wandb_project wandb_team warmup warmup_max_lr warmup_min_lr weight_a_init_method
weight_ab_mixer_init_method weight_b_init_method weight_c_init_method weight_decay whiten with_aml_log world_size
zero_stage
"""

ARGUMENTS = KnownSettings(
    frozenset((*_READ.split(), *VARIANTS)),
    frozenset(_IGNORED.split()),
    {name: f"MyTransformers' variant {name.removeprefix('use_')}" for name in _REFUSED_VARIANTS.split()} | _REFUSED,
)
